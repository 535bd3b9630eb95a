"""The operator on routed experts: checks, the registered torch operator, copies between devices."""
