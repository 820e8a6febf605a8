//! OS templates: building their caches from packages and unpacking them as shared layers.
