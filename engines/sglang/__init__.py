"""What runs inside SGLang's servers."""
