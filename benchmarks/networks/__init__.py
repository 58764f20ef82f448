"""The networks of the suite `models`, written once for each library."""
