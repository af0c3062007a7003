"""Records of patients: fields with a declared schema, a summary in words, an invented clinic, MEDS, layers of difficulty."""
