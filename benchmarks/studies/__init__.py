"""Studies of the methods: what each is to decide is written down first, then run; see docs/results."""
