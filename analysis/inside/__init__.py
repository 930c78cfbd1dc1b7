"""What `sparsemem probe` found inside a study's kept models, for the report: tables, figures and words."""
