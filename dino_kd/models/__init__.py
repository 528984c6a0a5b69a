"""Networks: the backbone over timm, the DINO head, the EMA update."""
