"""Where models lie: locations, weights, the cache, object stores."""
