"""The forms in which clients speak: each translates bodies into calls, and what happens into bytes."""
