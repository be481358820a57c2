"""Rows: read from files, checked, rendered, and made into token ids."""
