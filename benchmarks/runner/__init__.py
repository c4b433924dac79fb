"""What every claim is measured and written with."""
