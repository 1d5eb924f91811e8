"""The ledger of training: what each step did to the weights, and whether it adds up."""
