"""Second derivatives: exact Hessians of a Transformer's parts, and the spectra of whole models."""
