"""What keeps runs safe and fast without being an idea of the method: nothing here is needed to understand it."""
