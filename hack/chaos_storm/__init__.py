"""What hack/chaos is made of."""
