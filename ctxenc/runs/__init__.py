"""Read run folders and rebuild their networks, without the trainer."""
