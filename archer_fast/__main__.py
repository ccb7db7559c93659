"""`python -m archer_fast ...`: the command archer-fast of this very interpreter."""

from archer_fast.cli import main

if __name__ == "__main__":
    main()
