"""The building blocks of an experiment file's sections: checked value types, and errors that name key and value."""
