"""What a user reads of the ops: signatures, words and checks; no kernel."""
