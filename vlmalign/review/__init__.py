"""Blinded reader studies: readers judge answers without knowing who wrote them; design, web application, record, export."""
