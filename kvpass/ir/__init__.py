"""The intermediate representation: programs, sites, the builder, the printer and the verifier."""
