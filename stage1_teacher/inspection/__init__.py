"""What a cache holds, how far it is from its teacher, and how that is shown."""
