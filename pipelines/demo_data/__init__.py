"""Data that `diptych demo` draws for itself."""
