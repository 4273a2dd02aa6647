/* Loads each state file that is named after the weights, and reads a token after each that loads. */
#include <math.h>
#include <stdio.h>

#include "ramnet.h"

int main(int count, char** arguments) {
  ramnet_model* model;
  ramnet_state* state;
  int loaded = 0;
  static float logits[256];
  if (count < 2 || ramnet_vocabulary() != 256 || ramnet_open(arguments[1], 1, &model)) return 2;
  if (ramnet_state_create(model, &state)) return 2;
  for (int i = 2; i < count; i++) {
    const int status = ramnet_state_load(state, arguments[i]);
    if (status != RAMNET_OK && status != RAMNET_BAD_FILE) return 3;
    if (ramnet_token(model, state, i % 256, logits)) return 4;
    loaded += status == RAMNET_OK;
  }
  ramnet_state_free(state);
  ramnet_close(model);
  printf("%d\n", loaded);
  return 0;
}
