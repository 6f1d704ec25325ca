"""What plans promise and what runs took, for people to look at."""
