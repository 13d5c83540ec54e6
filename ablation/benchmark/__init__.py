"""Times of each stage beside the origin's way and beside what the machine can do at best."""
