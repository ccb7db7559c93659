"""One file an algorithm, each on the same rollout, buffer, packed trunk and ops."""
