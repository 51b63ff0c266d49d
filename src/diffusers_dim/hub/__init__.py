"""Models on the Hub: code that goes with their weights, model cards, and uploads."""
