"""What goes on the wire: ids, hashing, messages, errors. No I/O, no clock."""
