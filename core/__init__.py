"""What every model shares: token layout, frame sets, budgets, relevance, the record of a selection."""
