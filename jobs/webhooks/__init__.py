"""What is told to addresses of the operator's choice: that a batch, or a response in the background, has ended."""
