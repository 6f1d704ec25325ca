"""Scripts that measure; nothing imports them."""
