"""Floor 4: the folder of a run as one static page of HTML."""
