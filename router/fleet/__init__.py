"""Who is in the fleet, what they hold and how busy they are."""
