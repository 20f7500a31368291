"""What every model shares: layout, frame sets, budgets, relevance, the record of a selection."""
