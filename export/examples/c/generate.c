/* Continues a text with a byte-level model: generate WEIGHTS TEXT BYTES. It takes the most probable byte each time. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ramnet.h"

static int failed(void) {
  fprintf(stderr, "%s\n", ramnet_message());
  return 1;
}

int main(int count, char** arguments) {
  ramnet_model* model;
  ramnet_state* state;
  if (count != 4) return fprintf(stderr, "usage: %s WEIGHTS TEXT BYTES\n", arguments[0]), 2;
  const char* text = arguments[2];
  const int length = (int)strlen(text), vocabulary = ramnet_vocabulary();
  if (length == 0 || vocabulary != 256) return fprintf(stderr, "it takes a text and a model of 256 bytes\n"), 2;

  if (ramnet_open(arguments[1], 1, &model)) return failed();
  if (ramnet_state_create(model, &state)) return failed();

  int32_t* ids = malloc(sizeof *ids * (size_t)length);
  float* logits = malloc(sizeof *logits * (size_t)vocabulary);
  if (ids == NULL || logits == NULL) return fprintf(stderr, "there is no memory\n"), 1;
  for (int i = 0; i < length; i++) ids[i] = (unsigned char)text[i];
  if (ramnet_tokens(model, state, ids, length, logits, 1)) return failed();

  fputs(text, stdout);
  for (int left = atoi(arguments[3]); left > 0; left--) {
    int best = 0;
    for (int i = 1; i < vocabulary; i++)
      if (logits[i] > logits[best]) best = i;
    putchar(best);
    fflush(stdout);
    if (ramnet_token(model, state, best, logits)) return failed();
  }
  putchar('\n');
  free(logits);
  free(ids);
  ramnet_state_free(state);
  ramnet_close(model);
  return 0;
}
