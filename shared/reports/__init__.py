"""What reports are made of: pages, figures, the point at which a cache pays."""
