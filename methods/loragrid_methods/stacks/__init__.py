"""Shared by all methods: the contract, the stacks, the pack that holds them, its optimizer, the export."""
