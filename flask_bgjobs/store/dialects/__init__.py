"""The stores of the supported databases."""
