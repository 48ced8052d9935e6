"""The drivers of `vif`."""
