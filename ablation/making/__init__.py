"""Data sets that the experiment reads: from folders of adapter files, from digits, synthetic ones."""
