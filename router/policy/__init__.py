"""Pure decisions: placement now; admission, retention and roles join here."""
