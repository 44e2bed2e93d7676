"""What the documents show of the committed results."""
