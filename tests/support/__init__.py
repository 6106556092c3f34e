"""What the numerical tests share: small networks, the oracle, candidates, the layers of the parity suite and its mutants."""
