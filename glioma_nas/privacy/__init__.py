"""Keep identifiers out of what leaves the hospital: pseudonyms, headers without free text, and a scan for leftovers."""
