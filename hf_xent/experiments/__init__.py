"""Floor 4: runs that are compared with one another: their arms, their curves, and the page that reports them."""
