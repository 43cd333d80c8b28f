// Draws the K/V blocks of a tier as a map of cells on a canvas, and tells what lies in one. Knows no server.

import { count, plural } from "./dom.js";

const FULL = 255; // see messages.BlockMap
const TALLEST = 260;
const COLUMNS = 16; // the number of columns is a multiple of this

/** Bytes out of the base64 of a column. */
export const column = (encoded) => Uint8Array.from(atob(encoded), (char) => char.charCodeAt(0));

/** The colours of states and prefixes, as the style sheet has them just now. */
export function readPalette(legend, families) {
  const colour = (each) => getComputedStyle(each).backgroundColor;
  const states = [...legend.querySelectorAll("[data-state]")].map((each) => [each.dataset.state, colour(each)]);
  return { ...Object.fromEntries(states), families: [...families.children].map(colour) };
}

/** A prefix keeps its colour as long as it is shared. */
export const familyNumber = (root, palette) => root % palette.families.length;

export class BlockMapView {
  constructor(canvas) {
    this.canvas = canvas;
    this.blocks = null;
  }

  /** Show the blocks. `prefixCells` has the number of a prefix for each cell, from 1 on, and 0 where there is none. */
  draw(blocks, palette, prefixes = [], prefixCells = new Uint8Array()) {
    this.blocks = blocks;
    this.prefixes = prefixes;
    this.prefixCells = prefixCells;
    const cells = blocks.held.length;
    const width = this.canvas.parentElement.clientWidth;
    if (!cells || !width) return;
    this.columns = COLUMNS;
    while (Math.ceil(cells / this.columns) * (width / this.columns) > TALLEST) this.columns += COLUMNS;
    this.size = width / this.columns;
    const ratio = devicePixelRatio || 1;
    const height = Math.ceil(cells / this.columns) * this.size;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext("2d");
    for (let cell = 0; cell < cells; cell += 1) this.drawCell(context, cell, palette, this.size * ratio);
  }

  drawCell(context, cell, palette, size) {
    const column = cell % this.columns;
    const row = Math.floor(cell / this.columns);
    const [x, y] = [Math.round(column * size), Math.round(row * size)];
    const gap = size >= 5 ? Math.max(1, Math.round(size / 12)) : 0.5;
    const [width, height] = [Math.round((column + 1) * size) - x - gap, Math.round((row + 1) * size) - y - gap];
    const fill = (colour, level) => {
      if (!level) return;
      context.globalAlpha = 0.4 + (0.6 * level) / FULL;
      context.fillStyle = colour;
      context.fillRect(x, y, width, height);
    };
    fill(palette.free, FULL);
    fill(palette.cached, this.blocks.cached[cell]);
    fill(palette.held, this.blocks.held[cell]);
    const prefix = this.prefixes[this.prefixCells[cell] - 1];
    fill(prefix ? palette.families[familyNumber(prefix.root, palette)] : palette.shared, this.blocks.shared[cell]);
    context.globalAlpha = 1;
    if (this.blocks.shared[cell] && width >= 6) {
      // Not by colour alone.
      context.fillStyle = palette.free;
      const dot = Math.max(2, Math.round(width / 4));
      context.fillRect(x + Math.round((width - dot) / 2), y + Math.round((height - dot) / 2), dot, dot);
    }
  }

  /** What lies in the cell at a place on the canvas; null beside the cells. */
  describe(offsetX, offsetY) {
    if (!this.blocks?.held.length) return null;
    const place = Math.floor(offsetX / this.size);
    const cell = Math.floor(offsetY / this.size) * this.columns + place;
    if (place >= this.columns || cell >= this.blocks.held.length) return null;
    const { blocks_per_cell: perCell, num_blocks: total } = this.blocks;
    const first = cell * perCell;
    const last = Math.min(first + perCell, total) - 1;
    const where = perCell === 1 ? `Block ${count(first)}` : `Blocks ${count(first)} to ${count(last)}`;
    const states = ["cached", "held", "shared"]
      .map((state) => [state, Math.floor((this.blocks[state][cell] * perCell) / FULL)])
      .filter(([, number]) => number > 0);
    const told = states.map(([state, number]) => (perCell === 1 ? WORDS[state] : `${count(number)} ${state}`));
    const prefix = this.prefixes[this.prefixCells[cell] - 1];
    if (prefix) told.push(`prefix of ${plural(prefix.num_seqs, "sequence")}`);
    return `${where}: ${told.join(", ") || "free"}`;
  }
}

const WORDS = { cached: "cached, can be hit", held: "held by one sequence", shared: "shared by several" };
