"""What differential privacy costs, and what it promises."""
