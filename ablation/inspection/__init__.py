"""What is in a collection of LoRAs, and what in it could mislead."""
