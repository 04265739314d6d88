"""What ``python -m muxio bench`` runs. Each benchmark says what is measured; `measure` and `report` serve them all."""
