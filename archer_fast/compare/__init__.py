"""Several algorithms, several seeds, one budget: the runs, what they left behind, and the page that compares them."""
