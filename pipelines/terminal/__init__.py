"""What people see of a run: this program's own words, on streams that may be closed or full."""
