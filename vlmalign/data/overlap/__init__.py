"""Cases that stand in a training set and in an evaluation set: by patient, path, picture and wording."""
