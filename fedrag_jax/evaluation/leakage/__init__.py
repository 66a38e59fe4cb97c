"""What training and serving give away, by attacks whose success is measured."""
