"""What a person takes away: LoRAs and full weights that other programs load."""
